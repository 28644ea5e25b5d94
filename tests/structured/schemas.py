"""Schemas of many kinds, and what says whether a text satisfies one: the jsonschema package."""

from __future__ import annotations

import json
from typing import Any

from jsonschema import Draft202012Validator

SCHEMAS: dict[str, dict[str, Any]] = {
    "nested objects": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "address": {
                "type": "object",
                "properties": {
                    "street": {"type": "string", "maxLength": 20},
                    "geo": {
                        "type": "object",
                        "properties": {"lat": {"type": "integer"}, "lon": {"type": "integer"}},
                        "required": ["lat", "lon"],
                        "additionalProperties": False,
                    },
                },
                "required": ["street", "geo"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "address"],
        "additionalProperties": False,
    },
    "enums": {
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "green", "blue"]},
            "size": {"enum": [1, 2, 3, None, True]},
            "unit": {"const": "cm"},
        },
        "required": ["color", "size", "unit"],
        "additionalProperties": False,
    },
    "arrays with bounds": {
        "type": "object",
        "properties": {
            "few": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
            "none": {"type": "array", "items": {"type": "boolean"}, "maxItems": 0},
            "matrix": {
                "type": "array",
                "items": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0, "maximum": 9},
                    "minItems": 2,
                    "maxItems": 2,
                },
                "minItems": 1,
                "maxItems": 3,
            },
        },
        "required": ["few", "none", "matrix"],
        "additionalProperties": False,
    },
    "unions": {
        "type": "object",
        "properties": {
            "id": {"type": ["integer", "null"]},
            "shape": {
                "oneOf": [
                    {
                        "type": "object",
                        "properties": {"kind": {"const": "circle"}, "r": {"type": "integer"}},
                        "required": ["kind", "r"],
                        "additionalProperties": False,
                    },
                    {
                        "type": "object",
                        "properties": {"kind": {"const": "point"}},
                        "required": ["kind"],
                        "additionalProperties": False,
                    },
                    {"type": "string", "maxLength": 8},
                ]
            },
        },
        "required": ["id", "shape"],
        "additionalProperties": False,
    },
    "patterns": {
        "type": "object",
        "properties": {
            "zip": {"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"},
            "sku": {"type": "string", "pattern": "^(AB|CD)-[a-f]{2,4}$"},
        },
        "required": ["zip", "sku"],
        "additionalProperties": False,
    },
    "recursion": {
        "$defs": {
            "person": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 10},
                    "parent": {
                        "anyOf": [
                            {"type": "string", "maxLength": 10},
                            {"type": "null"},
                            {"$ref": "#/$defs/person"},
                        ]
                    },
                },
                "required": ["name", "parent"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/person",
    },
    "numbers with ranges": {
        "type": "object",
        "properties": {
            "age": {"type": "integer", "minimum": 18, "maximum": 130},
            "below": {"type": "integer", "exclusiveMaximum": 0, "minimum": -1000},
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "even": {"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 5000},
        },
        "required": ["age", "below", "share", "even"],
        "additionalProperties": False,
    },
    "formats": {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "ip": {"type": "string", "format": "ipv4"},
            "id": {"type": "string", "format": "uuid"},
        },
        "required": ["day", "ip", "id"],
        "additionalProperties": False,
    },
    "optional properties": {
        "type": "object",
        "properties": {
            "a": {"type": "boolean"},
            "b": {"type": "string", "minLength": 2, "maxLength": 6},
            "c": {"type": "null"},
        },
        "required": ["b"],
        "additionalProperties": False,
    },
    "tuples": {
        "type": "array",
        "prefixItems": [{"type": "string", "maxLength": 10}, {"type": "integer"}, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "references": {
        "$defs": {
            "word": {"type": "string", "maxLength": 12},
            "pair": {
                "type": "object",
                "properties": {"k": {"$ref": "#/$defs/word"}, "v": {"$ref": "#/$defs/word"}},
                "required": ["k", "v"],
                "additionalProperties": False,
            },
        },
        "type": "array",
        "items": {"$ref": "#/$defs/pair"},
        "minItems": 1,
        "maxItems": 3,
    },
    "named keys": {
        "type": "object",
        "properties": {'quote"': {"type": "boolean"}, "ключ 🔑": {"type": "boolean"}},
        "required": ['quote"', "ключ 🔑"],
        "additionalProperties": False,
    },
}


def check_answer(text: str, schema: dict[str, Any]) -> None:
    """Raise unless ``text`` is JSON that satisfies ``schema``, formats included."""
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    validator.validate(json.loads(text))
