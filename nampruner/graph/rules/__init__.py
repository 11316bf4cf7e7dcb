"""What each family of ATen ops does to the labels: one small function per family, one table.

A rule takes the `Call` and returns the layers of each result. It may tie labels that must go
together, freeze channels that an op mixes, note a contraction (where a removed channel stops
mattering) and note literals (numbers that may be hard-coded widths). An op that is not in the table
freezes what touches it: a wrong guess is never made.

elementwise.py   position by position        contraction.py   convolutions, products, attention
reduction.py     normalization, sums         movement.py      views, splits, concatenations
"""

from nampruner.graph.rules.contraction import attention, convolution, linear, matmul
from nampruner.graph.rules.elementwise import elementwise, fixed, overwrite, unknown
from nampruner.graph.rules.movement import (
    concatenate,
    halves,
    move,
    patches,
    pick,
    reshape,
    restride,
    shuffle_pixels,
    split,
    stack,
    take,
)
from nampruner.graph.rules.reduction import (
    batch_norm,
    group_norm,
    layer_norm,
    pad,
    reduction,
    softmax,
    spatial,
)
from nampruner.graph.tracer import Rule


def _table() -> dict[str, Rule]:
    families: dict[Rule, str] = {
        elementwise: """
            add sub rsub mul div pow maximum minimum fmod remainder atan2 where lerp
            addcmul addcdiv relu relu6 silu sigmoid hardtanh hardswish hardsigmoid
            gelu leaky_relu tanh mish elu celu selu clamp clamp_min clamp_max neg
            abs exp expm1 log log1p sqrt rsqrt square reciprocal erf sin cos sign
            floor ceil round softplus log_sigmoid_forward threshold logit heaviside
            _to_copy to clone dropout native_dropout bernoulli detach alias
            lift_fresh contiguous zeros_like ones_like empty_like full_like
            rand_like randn_like masked_fill _prelu_kernel prelu rrelu_with_noise gt
            lt ge le eq ne logical_and logical_or logical_not bitwise_and bitwise_or
            isnan isinf isfinite nan_to_num fill zero type_as positive trunc
            fake_quantize_per_tensor_affine _fused_dropout hardshrink softshrink""",
        overwrite: "copy",
        fixed: "new_zeros new_ones new_empty new_full size sym_size item _local_scalar_dense",
        convolution: "convolution _convolution mkldnn_convolution cudnn_convolution",
        matmul: "mm addmm bmm baddbmm",
        linear: "linear mkldnn_linear",
        attention: """
            _scaled_dot_product_flash_attention_for_cpu
            _scaled_dot_product_flash_attention
            _scaled_dot_product_efficient_attention
            _scaled_dot_product_cudnn_attention""",
        batch_norm: """
            native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm
            _native_batch_norm_legit _batch_norm_with_update _batch_norm_no_update""",
        layer_norm: "native_layer_norm",
        group_norm: "native_group_norm",
        spatial: """
            max_pool1d max_pool2d max_pool3d max_pool2d_with_indices
            max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
            _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d
            adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d
            upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
            upsample_linear1d upsample_bilinear2d upsample_trilinear3d
            upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
            reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
            replication_pad2d replication_pad3d grid_sampler_2d""",
        pad: "constant_pad_nd",
        reduction: """
            mean sum amax amin max min var var_mean std std_mean norm
            linalg_vector_norm logsumexp prod any all argmax argmin median""",
        softmax: "_softmax _log_softmax cumsum cumprod sort topk",
        move: """
            permute transpose t unsqueeze squeeze flip roll repeat select expand
            narrow movedim unfold repeat_interleave diagonal rot90 numpy_T mT""",
        reshape: "view _unsafe_view reshape flatten unflatten _reshape_alias",
        restride: "as_strided",
        take: "slice",
        split: "split split_with_sizes unbind chunk unsafe_split unsafe_chunk split_copy",
        concatenate: "cat concat",
        stack: "stack",
        pick: "index index_select gather",
        halves: "glu",
        patches: "im2col col2im",
        shuffle_pixels: "pixel_shuffle pixel_unshuffle",
    }
    table: dict[str, Rule] = {op: rule for rule, ops in families.items() for op in ops.split()}
    return {**table, "?": unknown}


RULES: dict[str, Rule] = _table()
"""ATen op (without overload and in-place underscore) → rule; `?` is the rule for all others."""
