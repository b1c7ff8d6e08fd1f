"""The C++ extension: see cpp/module.cpp. Tensors are contiguous, on the CPU; ValueError, TypeError else."""

from torch import Tensor

def attention(
    q: Tensor,
    cache: Tensor,
    spans: Tensor,
    tables: Tensor,
    out: Tensor,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    kv_scales: Tensor | None = None,
    sinks: Tensor | None = None,
    isa: str = "auto",
) -> None:
    """See attention.py; every tensor is a matrix: cache [blocks, rest], spans int64 [n, 3], tables int32."""

def attention_isas() -> list[str]:
    """What ``isa`` can be here, slowest first."""

def write_kv(
    kv: Tensor,
    cache: Tensor,
    slots: Tensor,
    kv_heads: int,
    head_dim: int,
    kv_scales: Tensor | None = None,
    isa: str = "auto",
) -> None:
    """kv float32 [T, 2 * kv_heads * head_dim] into ``cache`` at slots int32 [1, T]."""

def turn_columns(
    weight: Tensor,
    places: Tensor,
    importance: Tensor,
    turned: Tensor,
    scales: Tensor,
    element: tuple[int, int, int, int, float, int],
    search: bool,
    alone: bool,
) -> None:
    """See column_rounding.py and cpp/column_rounding.h; ``alone``: without the pool's threads."""

def round_columns(
    turned: Tensor,
    scales: Tensor,
    blocks: Tensor,
    reach: Tensor,
    pull: Tensor | None,
    diagonal: Tensor,
    pending: Tensor | None,
    errors: Tensor,
    before: Tensor,
    element: tuple[int, int, int, int, float, int],
    alone: bool,
) -> None: ...
def put_columns(
    turned: Tensor,
    places: Tensor,
    scales: Tensor,
    weight: Tensor,
    codes: Tensor,
    turned_back: Tensor,
    element: tuple[int, int, int, int, float, int],
    alone: bool,
) -> None: ...
def round_rows(
    rows: Tensor,
    first: int,
    reach: Tensor,
    standing: Tensor,
    element: tuple[int, int, int, int, float, int],
    alone: bool,
) -> None:
    """See row_rounding.py and cpp/row_rounding.h."""

def cpu_features() -> dict[str, bool]:
    """What ``isa`` of packed layers can be, slowest first, and whether it can be used here."""

def threads() -> int: ...
def set_threads(count: int) -> None: ...
def expect_contention(expected: bool) -> None:
    """For tests: as if other work were always seen on the cores, so that helpers take part in every walk."""

PACKED_LAYOUT: int

def packed_tiles(n: int) -> int: ...
def packed_tile_bytes(kind: str, k: int) -> int: ...
def packed_pack(codes: Tensor, scales: Tensor | None, data: Tensor, kind: str) -> None:
    """data [tiles, tile bytes] = W: mxfp4 blocks [n, k / 2], int8 codes [n, k] or bf16 [n, k]."""

def packed_linear(
    x: Tensor, data: Tensor, kind: str, bias: Tensor | None, out: Tensor, arithmetic: str, isa: str = "auto"
) -> None:
    """out [m, n] float32 = x [m, k] float32 times W transposed, plus bias [1, n] float32."""

def implement_torch_linear(library: int) -> None:
    """torch.ops.fourfold.mxfp4_linear on the CPU; ``library`` is dlopen's handle. Else RuntimeError."""

def packed_checksum(data: Tensor) -> int:
    """64 bits of uint8 [a, b]: whether they are the bytes that were written."""

def packed_unpack(data: Tensor, kind: str, n: int, rows: Tensor, out: Tensor) -> None:
    """out [r, k] float32 = the given rows [r, 1] (int64) of W."""

class Program:
    """See program.py, which says what the arguments are."""

    def __init__(self, most_rows: int, vocabulary: int) -> None: ...
    def __len__(self) -> int: ...
    @staticmethod
    def apply_scheme(
        x: Tensor, rotation: Tensor | None, element: tuple[float, int, int, int, bool] | None, out: Tensor
    ) -> None: ...
    @staticmethod
    def prepared_bytes(arithmetic: str, rows: int, k: int) -> int: ...
    def embed(self, table: object, scale: float, out: Tensor) -> None: ...
    def angles(self, speeds: list[float], scale: float, out: Tensor) -> None: ...
    def rows(
        self,
        x: Tensor,
        n: int,
        norm: Tensor | None = None,
        floor: float = 0.0,
        kind: str = "",
        alpha: float = 1.0,
        limit: float = 0.0,
        prepared: list[tuple[str, Tensor]] = ...,
        rotation: Tensor | None = None,
        element: tuple[float, int, int, int, bool] | None = None,
        out: Tensor | None = None,
        accumulate: bool = False,
        each: int = 1,
    ) -> None:
        """x [rows * each, n] (gated: 2 n) is gated, normed; then prepared, stored or added."""

    def choose(self, buffers: list[tuple[Tensor, int]]) -> None: ...
    def route(
        self, x: Tensor, n: int, weight: Tensor, bias: Tensor | None, top_k: int, among_chosen: bool
    ) -> None: ...
    def gather(self, source: tuple[str, Tensor], target: tuple[str, Tensor], k: int) -> None: ...
    def experts(
        self,
        weights: list,
        input: tuple[str, Tensor],
        out: Tensor,
        gate: str,
        alpha: float,
        limit: float,
    ) -> None: ...
    def combine(self, x: Tensor, n: int, out: Tensor, accumulate: bool) -> None: ...
    def linear(
        self,
        weight: object,
        input: tuple[str, Tensor],
        out: Tensor,
        column: int = 0,
        accumulate: bool = False,
    ) -> None: ...
    def gated(
        self,
        weight: object,
        input: tuple[str, Tensor],
        out: Tensor | None,
        gate: str,
        alpha: float,
        limit: float,
        prepared: list[tuple[str, Tensor]] = ...,
        rotation: Tensor | None = None,
        element: tuple[float, int, int, int, bool] | None = None,
    ) -> None: ...
    def logits(
        self, weight: object, input: tuple[str, Tensor], out: Tensor, tokens: Tensor, cap: float
    ) -> None: ...
    def heads(
        self,
        qkv: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        angles: Tensor,
        norm: Tensor | None,
        floor: float,
        layer: int,
        kv_type: str,
        kv_scales: Tensor | None,
    ) -> None: ...
    def attention(
        self,
        qkv: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        out: Tensor,
        layer: int,
        kv_type: str,
        kv_scales: Tensor | None,
        scale: float,
        softcap: float,
        window: int,
        sinks: Tensor | None,
        longest: int,
    ) -> None: ...
    def use_cache(self, cache: Tensor, blocks: int, block_size: int) -> None: ...
    def run(
        self, begin: int, end: int, tokens: object, spans: object, tables: object, chosen: object
    ) -> None: ...
