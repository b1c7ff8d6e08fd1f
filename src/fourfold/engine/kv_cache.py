"""The paged KV cache: one tensor of blocks, a pool that shares and recycles them, a table per sequence.

A block holds ``block_size`` consecutive tokens of one sequence, for every layer. A full block is known by a
digest chained over all tokens up to its end, so equal beginnings find each other's blocks; a block that
nobody holds stays findable until the pool, oldest first, hands it to someone else. Block 0 is never handed
out: it stays zero and pads tables in batched reads. The price of sharing is a digest per full block.
"""

from array import array
from collections import OrderedDict
from hashlib import blake2b

import numpy as np
import torch

from fourfold.engine.kv_format import KVFormat
from fourfold.kernels.cpu.memory import large_pages


class KVCache:
    """Keys and values of all blocks: [layers, blocks, block_size, 2 * kv_heads, width of ``form``].

    ``form`` says how they are held; keys come first in the head dimension.
    """

    def __init__(self, layers: int, blocks: int, block_size: int, kv_heads: int, form: KVFormat):
        self.block_size, self.heads, self.form = block_size, kv_heads, form
        shape = (layers, blocks, block_size, 2 * kv_heads, form.width)
        # what no token has reached costs no memory yet
        self.data = large_pages(*shape, form.stored_dtype.itemsize).view(form.stored_dtype).view(shape)
        self._slots = [layer.flatten(0, 1) for layer in self.data]
        self._blocks = [layer.flatten(1) for layer in self.data]

    def write(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Store kv [T, 2 * kv_heads, head_dim] at ``slots`` [T] (block * block_size + offset)."""
        self._slots[layer].index_copy_(0, slots, self.form.encode(layer, kv))

    def read(self, layer: int, blocks: torch.Tensor, rows: int) -> torch.Tensor:
        """Gather ``blocks`` [rows * n] in order -> [rows, n * block_size, 2 * kv_heads, head_dim]."""
        kv = self._blocks[layer].index_select(0, blocks)
        return self.form.decode(layer, kv.view(rows, -1, 2 * self.heads, self.form.width))


class BlockPool:
    """Which blocks are free, who is cached, how many hold each. Free blocks leave oldest first."""

    def __init__(self, blocks: int, block_size: int, share: bool = True):
        self.block_size, self.share = block_size, share
        self.total = blocks - 1
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, blocks))
        self._holders = [0] * blocks
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def take(self) -> int:
        """A block for new content; its old content can no longer be found."""
        block, _ = self.free.popitem(last=False)
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        self._holders[block] = 1
        return block

    def find(self, digest: bytes) -> int | None:
        """The block whose content has this digest, if any; it is not yet held."""
        return self._block_of.get(digest)

    def hold(self, block: int) -> None:
        """One more sequence uses ``block``."""
        self.free.pop(block, None)
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """One sequence less uses ``block``; without holders it becomes free, findable until taken."""
        self._holders[block] -= 1
        if not self._holders[block]:
            self.free[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Let others find ``block``; when an equal block is known already, that one stays the known one."""
        if self.share and digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest


class BlockTable:
    """The blocks of one sequence in order, and the digests of its full blocks."""

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self.blocks = array("i")  # what C++ reads without a conversion
        self._digests: list[bytes] = []
        self._published = 0

    def missing(self, tokens: int) -> int:
        """How many more blocks ``tokens`` tokens need."""
        return -(-tokens // self.pool.block_size) - len(self.blocks)

    def grow(self, tokens: int) -> bool:
        """Make room for ``tokens`` tokens in all; False, and nothing taken, when the pool has too few."""
        missing = self.missing(tokens)
        if missing > len(self.pool.free):
            return False
        self.blocks.extend(self.pool.take() for _ in range(missing))
        return True

    def reuse(self, tokens: list[int]) -> int:
        """Hold the known blocks that begin ``tokens``, all but its last token. Returns the tokens covered."""
        size = self.pool.block_size
        for index in range((len(tokens) - 1) // size if self.pool.share else 0):
            block = self.pool.find(self._digest(index, tokens))
            if block is None:
                break
            self.pool.hold(block)
            self.blocks.append(block)
        self._published = len(self.blocks)
        return len(self.blocks) * size

    def publish(self, tokens: list[int], computed: int) -> None:
        """Let others find the blocks that the first ``computed`` tokens have filled."""
        if not self.pool.share:
            return
        for index in range(self._published, computed // self.pool.block_size):
            self.pool.publish(self.blocks[index], self._digest(index, tokens))
            self._published = index + 1

    def release(self) -> None:
        """Give every block back, the last first, so that beginnings stay findable longest."""
        for block in reversed(self.blocks):
            self.pool.release(block)
        del self.blocks[:]
        self._published = 0

    def _digest(self, index: int, tokens: list[int]) -> bytes:
        """Digest of block ``index`` chained over all before it; a sequence's tokens never change, so kept."""
        size = self.pool.block_size
        while len(self._digests) <= index:
            at = len(self._digests)
            content = np.asarray(tokens[at * size : (at + 1) * size], dtype=np.int64).tobytes()
            before = self._digests[-1] if self._digests else b""
            self._digests.append(blake2b(before + content, digest_size=16).digest())
        return self._digests[index]
