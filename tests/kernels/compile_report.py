"""Compiles the Triton kernels for cards that aren't here, and prints what the compiler made of them as JSON.

``python tests/kernels/compile_report.py --table`` prints a table instead.
"""
