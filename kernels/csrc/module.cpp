// The Python module minivllm_kernels._cpu: every function of kernels.h once per instruction set that was
// compiled, as "avx2_linear" and so on, taking addresses and numbers. cpu.py is its only caller.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <tuple>
#include <type_traits>
#include <utility>

#define ISA portable
#include "kernels.h"
#undef ISA
#if defined(MINIVLLM_X86)
#include <cpuid.h>
#define ISA avx2
#include "kernels.h"
#undef ISA
#define ISA avx512
#include "kernels.h"
#undef ISA
#endif

namespace {

template <class T>
T from_python(PyObject* value) {
    if constexpr (std::is_pointer_v<T>)
        return static_cast<T>(PyLong_AsVoidPtr(value));
    else if constexpr (std::is_floating_point_v<T>)
        return static_cast<T>(PyFloat_AsDouble(value));
    else
        return static_cast<T>(PyLong_AsLongLong(value));
}

// A Python function from a C++ one: converts each argument to its type, and lets other threads run.
template <auto F>
struct Binding;

template <class... Args, void (*F)(Args...)>
struct Binding<F> {
    static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
        if (num_args != Py_ssize_t(sizeof...(Args))) {
            PyErr_Format(PyExc_TypeError, "takes %zu arguments, got %zd", sizeof...(Args), num_args);
            return nullptr;
        }
        return convert(args, std::index_sequence_for<Args...>{});
    }

    template <size_t... I>
    static PyObject* convert(PyObject* const* args, std::index_sequence<I...>) {
        std::tuple<Args...> values{from_python<Args>(args[I])...};
        if (PyErr_Occurred()) return nullptr;
        Py_BEGIN_ALLOW_THREADS
        F(std::get<I>(values)...);
        Py_END_ALLOW_THREADS
        Py_RETURN_NONE;
    }
};

// Instruction sets that this CPU has, best first.
PyObject* instruction_sets(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    auto add = [&](const char* name) {
        PyObject* text = PyUnicode_FromString(name);
        PyList_Append(names, text);
        Py_DECREF(text);
    };
#if defined(MINIVLLM_X86)
    __builtin_cpu_init();
    unsigned eax, ebx, ecx, edx;  // older compilers' __builtin_cpu_supports doesn't know "f16c"
    bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
    bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
    if (has_avx512) add("avx512");
    if (has_avx2) add("avx2");
#endif
    add("portable");
    return names;
}

#define FUNCTION(isa, name)                                                                               \
    {#isa "_" #name, (PyCFunction)(void (*)(void))Binding<&minivllm::isa::name>::call, METH_FASTCALL, nullptr}
#define FUNCTIONS(isa)                                                                               \
    FUNCTION(isa, linear), FUNCTION(isa, rms_norm_linear), FUNCTION(isa, embedding),                 \
        FUNCTION(isa, rms_norm), FUNCTION(isa, silu_and_mul), FUNCTION(isa, rotary),                 \
        FUNCTION(isa, rope_and_write_kv), FUNCTION(isa, paged_attention),                            \
        FUNCTION(isa, decoder_layers), FUNCTION(isa, draw), FUNCTION(isa, keep_likely),              \
        FUNCTION(isa, peak_int8)

PyMethodDef methods[] = {
#if defined(MINIVLLM_X86)
    FUNCTIONS(avx2),
    FUNCTIONS(avx512),
#endif
    FUNCTIONS(portable),
    {"instruction_sets", instruction_sets, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
