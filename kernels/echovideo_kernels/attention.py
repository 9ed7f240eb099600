"""Joint text-video attention: full, unmasked softmax attention over (batch, tokens, heads, head_dim) tensors.

On Hopper, for bfloat16 and 64 features a head, a Gluon kernel computes 2^s without first subtracting the row's
maximum, and certifies each tile afterwards; tiles that fail are computed again with the running maximum.
`kernels/README.md` explains why that is exact.
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
import torch.nn.functional as F

from echovideo_kernels._triton import gl, gluon_jit, hopper, jit, tl
from echovideo_kernels.dispatch import options, serves

_WARPGROUPS = 4
_TILE_ROWS = 64 * _WARPGROUPS
_SAMPLED_ROWS = 64
_SAMPLED_KEYS = 1024
_LOG2_LIMIT = 110.0


def attention(
    q_BNHD: torch.Tensor, k_BNHD: torch.Tensor, v_BNHD: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Return softmax(scale * q k^T) v as o_BNHD, contiguous, in q's dtype; `scale` defaults to head_dim ** -0.5.

    All of q, k and v share batch, heads, head_dim and dtype, and are any strided view of (B, N, H, D). The dispatch
    table (`dispatch.py`) says which calls take the Hopper kernel; all others take PyTorch's
    scaled_dot_product_attention, which picks the backend for the device.
    """
    if not serves("attention", q_BNHD, q_BNHD.shape[1]) or not _takes(q_BNHD, k_BNHD, v_BNHD):
        return attention_reference(q_BNHD, k_BNHD, v_BNHD, scale)
    scale = q_BNHD.shape[-1] ** -0.5 if scale is None else scale
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q_BNHD, k_BNHD, v_BNHD))
    o_BNHD: torch.Tensor = _attention(q_BNHD, k_BNHD, v_BNHD, scale, trains)[0]
    return o_BNHD


def attention_reference(
    q_BNHD: torch.Tensor, k_BNHD: torch.Tensor, v_BNHD: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Do what `attention` does through PyTorch's scaled_dot_product_attention, in any dtype and on any device."""
    o_BHND = F.scaled_dot_product_attention(
        q_BNHD.transpose(1, 2), k_BNHD.transpose(1, 2), v_BNHD.transpose(1, 2), scale=scale
    )
    return o_BHND.transpose(1, 2)


def _takes(q_BNHD: torch.Tensor, k_BNHD: torch.Tensor, v_BNHD: torch.Tensor) -> bool:
    return all(
        tensor.dtype == torch.bfloat16
        and tensor.shape == q_BNHD.shape
        and tensor.shape[-1] == 64
        and tensor.stride(-1) == 1
        and all(stride % 8 == 0 for stride in tensor.stride()[:-1])
        for tensor in (q_BNHD, k_BNHD, v_BNHD)
    )


@torch.library.custom_op("echovideo::attention", mutates_args=(), device_types="cuda")
def _attention(
    q_BNHD: torch.Tensor, k_BNHD: torch.Tensor, v_BNHD: torch.Tensor, scale: float, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_attention(q_BNHD, k_BNHD, v_BNHD, scale, with_lse=with_lse)


@_attention.register_fake
def _(
    q_BNHD: torch.Tensor, k_BNHD: torch.Tensor, v_BNHD: torch.Tensor, scale: float, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q_BNHD, memory_format=torch.contiguous_format), _empty_lse(q_BNHD, with_lse)


def _empty_lse(q_BNHD: torch.Tensor, with_lse: bool) -> torch.Tensor:
    batch, num_tokens, num_heads, _ = q_BNHD.shape
    return q_BNHD.new_empty((batch, num_heads, num_tokens) if with_lse else (0,), dtype=torch.float32)


@torch.library.custom_op("echovideo::attention_backward", mutates_args=(), device_types="cuda")
def _attention_backward(
    do_BNHD: torch.Tensor,
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    v_BNHD: torch.Tensor,
    o_BNHD: torch.Tensor,
    lse_BHN: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk and dv by cuDNN's backward, which takes our output and log-sum-exp for its own."""
    num_tokens = q_BNHD.shape[1]
    unused = q_BNHD.new_empty(0, dtype=torch.int64)
    grads_BHND = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(tensor.transpose(1, 2) for tensor in (do_BNHD.contiguous(), q_BNHD, k_BNHD, v_BNHD, o_BNHD)),
        lse_BHN[..., None],
        unused,
        unused,
        None,
        None,
        None,
        num_tokens,
        num_tokens,
        0.0,
        False,
        scale=scale,
    )
    dq, dk, dv = (grad.transpose(1, 2).contiguous() for grad in grads_BHND)
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    do_BNHD: torch.Tensor,
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    v_BNHD: torch.Tensor,
    o_BNHD: torch.Tensor,
    lse_BHN: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BNHD, k_BNHD, v_BNHD))
    return dq, dk, dv


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, do_BNHD: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_attention_backward(do_BNHD, *ctx.saved_tensors, ctx.scale), None, None


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def launch_attention(
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    v_BNHD: torch.Tensor,
    scale: float,
    *,
    with_lse: bool,
    stages: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o_BNHD and the rows' log-sum-exp (B, H, N) float32, empty unless `with_lse`, by the Hopper kernel.

    `stages` is the depth of the ring of key and value blocks, else the tuned one. Nothing waits for the GPU, so
    the call can be captured in a graph. Raises ValueError for inputs that the kernel does not take.
    """
    if not _takes(q_BNHD, k_BNHD, v_BNHD) or any(x.data_ptr() % 16 for x in (q_BNHD, k_BNHD, v_BNHD)):
        raise ValueError(
            "the attention kernel takes q, k and v of one shape (B, N, H, 64), bfloat16, features adjacent, rows at "
            "multiples of 16 bytes; not "
            + ", ".join(f"{tuple(x.shape)} {x.dtype} strides {x.stride()}" for x in (q_BNHD, k_BNHD, v_BNHD))
        )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, num_tokens, num_heads, head_dim = q_BNHD.shape
    o_BNHD = torch.empty_like(q_BNHD, memory_format=torch.contiguous_format)
    lse_BHN = _empty_lse(q_BNHD, with_lse)
    tiles_per_head = -(-num_tokens // _TILE_ROWS)
    num_tiles = batch * num_heads * tiles_per_head
    if num_tiles == 0:
        return o_BNHD, lse_BHN
    # Two counts, two lists of tiles, and a mark on each tile that failed its certificate.
    work = torch.zeros(2 + 3 * num_tiles, dtype=torch.int32, device=q_BNHD.device)
    counts, lists, failed = work.split([2, 2 * num_tiles, num_tiles])
    log2_scale = scale * math.log2(math.e)
    _plan_kernel[(batch * num_heads,)](
        q_BNHD,
        k_BNHD,
        counts,
        lists,
        num_tokens,
        num_heads,
        tiles_per_head,
        num_tiles,
        log2_scale,
        *(q_BNHD.stride()[:3]),
        *(k_BNHD.stride()[:3]),
        HEAD_DIM=head_dim,
        ROWS=_SAMPLED_ROWS,
        KEYS=_SAMPLED_KEYS,
        LIMIT=_LOG2_LIMIT,
        num_warps=4,
    )
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    q, k, v, o = (TensorDescriptor.from_tensor(x, [1, 64, 1, 64], layout) for x in (q_BNHD, k_BNHD, v_BNHD, o_BNHD))
    for second_pass in (False, True):
        _attention_kernel[(min(num_tiles, _multiprocessors(q_BNHD.device)),)](
            q,
            k,
            v,
            o,
            lse_BHN,
            counts,
            lists,
            failed,
            num_tokens,
            num_heads,
            tiles_per_head,
            num_tiles,
            log2_scale,
            STAGES=stages or options("attention", q_BNHD)["stages"],
            UNIT_SCALE=abs(log2_scale - 1) < 1e-12,
            WITH_LSE=with_lse,
            SECOND_PASS=second_pass,
            num_warps=4,
        )
    return o_BNHD, lse_BHN


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@jit
@no_type_check
def _plan_kernel(
    q_pointer,
    k_pointer,
    counts_pointer,
    lists_pointer,
    num_tokens,
    num_heads,
    tiles_per_head,
    num_tiles,
    log2_scale,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    # One program a head: put its tiles on the list of the first pass, or on that of the second where a sample of its
    # logits already shows that the first would fail.
    head = tl.program_id(0)
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    features = tl.arange(0, HEAD_DIM)
    rows = (tl.arange(0, ROWS).to(tl.int64) * num_tokens) // ROWS
    q = tl.load(q_pointer + b * q_stride_b + rows[:, None] * q_stride_n + h * q_stride_h + features[None, :])
    largest = tl.full([ROWS, 64], float("-inf"), tl.float32)
    for start in range(0, KEYS, 64):
        keys = ((start + tl.arange(0, 64)).to(tl.int64) * num_tokens) // KEYS
        k = tl.load(k_pointer + b * k_stride_b + keys[None, :] * k_stride_n + h * k_stride_h + features[:, None])
        largest = tl.maximum(largest, tl.dot(q, k) * log2_scale)
    doomed = (tl.max(tl.max(largest, 1), 0) > LIMIT).to(tl.int32)
    place = tl.atomic_add(counts_pointer + doomed, tiles_per_head)
    for start in range(0, tiles_per_head, 128):
        tile = start + tl.arange(0, 128)
        slot = lists_pointer + doomed * num_tiles + place + tile
        tl.store(slot, head * tiles_per_head + tile, mask=tile < tiles_per_head)


@gluon_jit
@no_type_check
def _attention_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    o_descriptor,
    lse_pointer,
    counts_pointer,
    lists_pointer,
    failed_pointer,
    num_tokens,
    num_heads,
    tiles_per_head,
    num_tiles,
    log2_scale,
    STAGES: gl.constexpr,
    UNIT_SCALE: gl.constexpr,
    WITH_LSE: gl.constexpr,
    SECOND_PASS: gl.constexpr,
):
    # Persistent. One warp loads; four warpgroups own 64 query rows each, and share every key and value block.
    q_memory = gl.allocate_shared_memory(gl.bfloat16, [8, 1, 64, 1, 64], q_descriptor.layout)
    o_memory = gl.allocate_shared_memory(gl.bfloat16, [4, 1, 64, 1, 64], o_descriptor.layout)
    k_memory = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 64, 1, 64], k_descriptor.layout)
    v_memory = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 64, 1, 64], v_descriptor.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
    kv_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    kv_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        hopper.mbarrier.init(q_ready.index(i), count=1)
        hopper.mbarrier.init(q_free.index(i), count=4)
    turns = gl.allocate_shared_memory(gl.int64, [4, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        hopper.mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(kv_ready.index(i), count=1)
        hopper.mbarrier.init(kv_free.index(i), count=4)
    hopper.fence_async_shared()
    memory = (q_memory, k_memory, v_memory, o_memory)
    barriers = (q_ready, q_free, kv_ready, kv_free, turns)
    lists = (counts_pointer, lists_pointer, failed_pointer)
    sizes = (num_tokens, num_heads, tiles_per_head, num_tiles)
    out = (o_descriptor, lse_pointer)
    # fmt: off
    gl.warp_specialize(
        [
            (_attend, (0, memory, barriers, lists, sizes, out, log2_scale, STAGES, UNIT_SCALE, WITH_LSE, SECOND_PASS)),
            (_attend, (1, memory, barriers, lists, sizes, out, log2_scale, STAGES, UNIT_SCALE, WITH_LSE, SECOND_PASS)),
            (_attend, (2, memory, barriers, lists, sizes, out, log2_scale, STAGES, UNIT_SCALE, WITH_LSE, SECOND_PASS)),
            (_attend, (3, memory, barriers, lists, sizes, out, log2_scale, STAGES, UNIT_SCALE, WITH_LSE, SECOND_PASS)),
            (_load, (memory, barriers, lists, sizes, q_descriptor, k_descriptor, v_descriptor, STAGES, SECOND_PASS)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )
    # fmt: on


@gluon_jit
@no_type_check
def _load(
    memory,
    barriers,
    lists,
    sizes,
    q_descriptor,
    k_descriptor,
    v_descriptor,
    STAGES: gl.constexpr,
    SECOND_PASS: gl.constexpr,
):
    q_memory, k_memory, v_memory, _ = memory
    q_ready, q_free, kv_ready, kv_free, _ = barriers
    counts_pointer, lists_pointer, _ = lists
    num_tokens, num_heads, tiles_per_head, num_tiles = sizes
    count = gl.load(counts_pointer + SECOND_PASS)
    step = 0
    turn = 0
    for place in range(gl.program_id(0), count, gl.num_programs(0)):
        tile = gl.load(lists_pointer + SECOND_PASS * num_tiles + place)
        head = tile // tiles_per_head
        b = head // num_heads
        h = head % num_heads
        row = (tile % tiles_per_head) * 256
        half = turn & 1
        hopper.mbarrier.wait(q_free.index(half), ((turn >> 1) & 1) ^ 1)
        hopper.mbarrier.expect(q_ready.index(half), 256 * 64 * 2)
        for i in gl.static_range(4):
            hopper.tma.async_copy_global_to_shared(
                q_descriptor, [b, row + i * 64, h, 0], q_ready.index(half), q_memory.index(half * 4 + i)
            )
        turn += 1
        for key in range(0, num_tokens, 64):
            stage = step % STAGES
            hopper.mbarrier.wait(kv_free.index(stage), ((step // STAGES) & 1) ^ 1)
            hopper.mbarrier.expect(kv_ready.index(stage), 2 * 64 * 64 * 2)
            hopper.tma.async_copy_global_to_shared(
                k_descriptor, [b, key, h, 0], kv_ready.index(stage), k_memory.index(stage)
            )
            hopper.tma.async_copy_global_to_shared(
                v_descriptor, [b, key, h, 0], kv_ready.index(stage), v_memory.index(stage)
            )
            step += 1


@gluon_jit
@no_type_check
def _attend(
    index: gl.constexpr,
    memory,
    barriers,
    lists,
    sizes,
    out,
    log2_scale,
    STAGES: gl.constexpr,
    UNIT_SCALE: gl.constexpr,
    WITH_LSE: gl.constexpr,
    SECOND_PASS: gl.constexpr,
):
    # One warpgroup's 64 rows of each tile. A key block's product with the queries and the last block's product with
    # the values go to the tensor cores together; while this group exponentiates, the other groups keep them busy.
    # Left alone, the groups fall into step and wait for the same unit, so they queue their products in turn.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    q_memory, k_memory, v_memory, o_memory = memory
    q_ready, q_free, kv_ready, kv_free, turns = barriers
    counts_pointer, lists_pointer, failed_pointer = lists
    num_tokens, num_heads, tiles_per_head, num_tiles = sizes
    o_descriptor, lse_pointer = out
    zeros = gl.zeros([64, 64], gl.float32, layout)
    num_blocks = gl.cdiv(num_tokens, 64)
    last_keys = num_tokens - (num_blocks - 1) * 64
    count = gl.load(counts_pointer + SECOND_PASS)
    step = 0
    turn = 0
    for place in range(gl.program_id(0), count, gl.num_programs(0)):
        half = turn & 1
        hopper.mbarrier.wait(q_ready.index(half), (turn >> 1) & 1)
        q = q_memory.index(half * 4 + index).reshape([64, 64])
        o = zeros
        row_max = gl.full([64], float("-inf"), gl.float32, rows_layout)
        row_sum = gl.sum(zeros, 1) if SECOND_PASS else gl.sum(zeros.reshape([64, 8, 8]), 1)
        hopper.mbarrier.wait(kv_ready.index(step % STAGES), (step // STAGES) & 1)
        k = k_memory.index(step % STAGES).reshape([64, 64]).permute((1, 0))
        s = hopper.warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        p, o, row_max, row_sum = _exponentiate(
            s, o, row_max, row_sum, log2_scale, num_tokens, True, UNIT_SCALE, SECOND_PASS
        )
        for _ in range(num_blocks - 2):
            s, o = _multiply(
                index, q, k_memory, v_memory, p, o, zeros, kv_ready, kv_free, turns, step, turn, STAGES, SECOND_PASS
            )
            p, o, row_max, row_sum = _exponentiate(
                s, o, row_max, row_sum, log2_scale, num_tokens, False, UNIT_SCALE, SECOND_PASS
            )
            step += 1
        if num_blocks > 1:
            s, o = _multiply(
                index, q, k_memory, v_memory, p, o, zeros, kv_ready, kv_free, turns, step, turn, STAGES, SECOND_PASS
            )
            p, o, row_max, row_sum = _exponentiate(
                s, o, row_max, row_sum, log2_scale, last_keys, True, UNIT_SCALE, SECOND_PASS
            )
            step += 1
        hopper.mbarrier.arrive(q_free.index(half), count=1)
        o = hopper.warpgroup_mma(p, v_memory.index(step % STAGES).reshape([64, 64]), o, is_async=True)
        o = hopper.warpgroup_mma_wait(0, deps=[o])
        hopper.mbarrier.arrive(kv_free.index(step % STAGES), count=1)
        step += 1
        turn += 1

        # Read again, for want of a register to keep it in.
        tile = gl.load(lists_pointer + SECOND_PASS * num_tiles + place)
        head = tile // tiles_per_head
        row = (tile % tiles_per_head) * 256 + index * 64
        if not SECOND_PASS:
            row_sum = gl.convert_layout(gl.sum(row_sum, 1), rows_layout)
            # With a row's sum at 1 or more nothing underflows that would not with the maximum subtracted; at 2^110 or
            # less, and with a finite o, nothing overflowed. A NaN fails every comparison.
            sound = (row_sum >= 1.0) & (row_sum <= 2.0**110) & (gl.sum(o * 0.0, 1) == 0.0)
            if gl.sum((sound == 0).to(gl.int32), 0) > 0:
                if gl.atomic_xchg(failed_pointer + tile, 1) == 0:
                    gl.store(lists_pointer + num_tiles + gl.atomic_add(counts_pointer + 1, 1), tile)
        hopper.tma.store_wait(0)
        o_memory.index(index).reshape([64, 64]).store((o * (1.0 / row_sum)[:, None]).to(gl.bfloat16))
        hopper.fence_async_shared()
        place_BNHD = [head // num_heads, row, head % num_heads, 0]
        hopper.tma.async_copy_shared_to_global(o_descriptor, place_BNHD, o_memory.index(index))
        if WITH_LSE:
            rows = row + gl.arange(0, 64, rows_layout)
            lse = gl.log2(row_sum) * 0.6931471805599453
            if SECOND_PASS:
                lse += row_max * 0.6931471805599453
            gl.store(lse_pointer + head * num_tokens + rows, lse, mask=rows < num_tokens)
    hopper.tma.store_wait(0)


@gluon_jit
@no_type_check
def _multiply(
    index: gl.constexpr,
    q,
    k_memory,
    v_memory,
    p,
    o,
    zeros,
    kv_ready,
    kv_free,
    turns,
    step,
    turn,
    STAGES: gl.constexpr,
    SECOND_PASS: gl.constexpr,
):
    # Return s = q k^T of the next block, and o + p v of this one.
    this = step % STAGES
    following = (step + 1) % STAGES
    hopper.mbarrier.wait(kv_ready.index(following), ((step + 1) // STAGES) & 1)
    k = k_memory.index(following).reshape([64, 64]).permute((1, 0))
    v = v_memory.index(this).reshape([64, 64])
    if SECOND_PASS:
        # The running maximum leaves too few registers for both products at once.
        o = hopper.warpgroup_mma_wait(0, deps=[hopper.warpgroup_mma(p, v, o, is_async=True)])
        s = hopper.warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
    else:
        # A tile of n blocks takes n - 1 turns. The first group need not wait for its first.
        hopper.mbarrier.wait(turns.index(index), ((step - turn) & 1) ^ (1 if index == 0 else 0))
        o = hopper.warpgroup_mma(p, v, o, is_async=True)
        s = hopper.warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        hopper.mbarrier.arrive(turns.index((index + 1) % 4), count=1)
        s, o = hopper.warpgroup_mma_wait(0, deps=[s, o])
    hopper.mbarrier.arrive(kv_free.index(this), count=1)
    return s, o


@gluon_jit
@no_type_check
def _exponentiate(
    s, o, row_max, row_sum, log2_scale, keys, MASKED: gl.constexpr, UNIT_SCALE: gl.constexpr, SECOND_PASS: gl.constexpr
):
    # Return p = 2^s as the next product's operand, rounded to bfloat16, with the sums of the rounded values added to
    # row_sum: in the first pass sums of this thread's columns alone, to be added up once a tile.
    layout: gl.constexpr = s.type.layout
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    if not UNIT_SCALE:
        s = s * log2_scale
    if MASKED:
        present = (gl.arange(0, 64, gl.SliceLayout(0, layout)) < keys)[None, :]
    if SECOND_PASS:
        if MASKED:
            s = gl.where(present, s, float("-inf"))
        new_max = gl.maximum(row_max, gl.max(s, 1))
        shrink = _exp2(row_max - new_max)
        row_max = new_max
        p, rounded = _round_to_bfloat16(_exp2(s - row_max[:, None]))
        row_sum = row_sum * shrink + gl.sum(rounded, 1)
        o = o * shrink[:, None]
    else:
        p = _exp2(s)
        if MASKED:
            p = gl.where(present, p, 0.0)
        p, rounded = _round_to_bfloat16(p)
        row_sum += gl.sum(rounded.reshape([64, 8, 8]), 1)
    return gl.convert_layout(p, operand_layout), o, row_max, row_sum


@gluon_jit
@no_type_check
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon_jit
@no_type_check
def _round_to_bfloat16(p):
    # Two at a time, and back to float32 by moving bits: the compiler would convert one by one on the slow unit that
    # also exponentiates.
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
        "=r,=r,=r,r,r",
        [p],
        dtype=(gl.bfloat16, gl.float32),
        is_pure=True,
        pack=2,
    )
