"""The element types that torch has, under the names that its pickles have for them.

Source: ``torch/storage.py`` and ``torch/serialization.py`` of 0.4 to 2.13.
"""

from __future__ import annotations

from converters.tensors import DType

STORAGES = {
    "DoubleStorage": DType.F64,
    "FloatStorage": DType.F32,
    "HalfStorage": DType.F16,
    "BFloat16Storage": DType.BF16,
    "LongStorage": DType.I64,
    "IntStorage": DType.I32,
    "ShortStorage": DType.I16,
    "CharStorage": DType.I8,
    "ByteStorage": DType.U8,
    "BoolStorage": DType.BOOL,
    "ComplexFloatStorage": DType.C64,
    "UntypedStorage": DType.U8,
}
# Kinds that torch 2.13 has and safetensors lacks: the type of an element, and its bytes.
UNREAD = {
    "ComplexDoubleStorage": ("complex128", 16),
    "QInt8Storage": ("qint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt8Storage": ("quint8", 1),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
}
NUMBERS_IN_A_BYTE = {"quint4x2": 2, "quint2x4": 4}
DTYPES = {
    "float64": DType.F64,
    "float32": DType.F32,
    "float16": DType.F16,
    "bfloat16": DType.BF16,
    "float8_e4m3fn": DType.F8_E4M3,
    "float8_e5m2": DType.F8_E5M2,
    "float8_e8m0fnu": DType.F8_E8M0,
    "float8_e4m3fnuz": DType.F8_E4M3FNUZ,
    "float8_e5m2fnuz": DType.F8_E5M2FNUZ,
    "float4_e2m1fn_x2": DType.F4,
    "int64": DType.I64,
    "int32": DType.I32,
    "int16": DType.I16,
    "int8": DType.I8,
    "uint8": DType.U8,
    "uint16": DType.U16,
    "uint32": DType.U32,
    "uint64": DType.U64,
    "bool": DType.BOOL,
    "complex64": DType.C64,
}
# The others of torch 2.13, with the bytes of an element.
UNREAD_DTYPES = {
    **{"complex32": 4, "complex128": 16, "bits16": 2},
    **dict.fromkeys(("bits1x8", "bits2x4", "bits4x2", "bits8"), 1),
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
    **{"qint8": 1, "qint32": 4, "quint8": 1, "quint4x2": 1, "quint2x4": 1},
}

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The class of storages of each type; an untyped one is written for none.
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
