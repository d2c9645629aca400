"""FLOPs counted from a jaxpr against counts by hand."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from ssljax.flops import count_flops, device_peak_flops


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


A, B = shape(3, 5), shape(5, 7)
ONCE = 2 * 3 * 5 * 7
SQUARE = shape(4, 4)
TURN = 2 * 4**3


def scanned(x, length=6):
  return jax.lax.scan(lambda c, _: (c @ c, None), x, length=length)[0]


@jax.custom_vjp
def custom(x):
  return x @ x


custom.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))

HAND = {
  "matmul": (lambda a, b: a @ b, (A, B), ONCE),
  "elementwise": (lambda a: jnp.tanh(a) + a.sum(), (A,), 0),
  "batched": (lambda a: jnp.einsum("bij,bkj->bik", a, a), (shape(9, 3, 5),), 9 * 2 * 3 * 5 * 3),
  "vector": (lambda a, b: a @ b, (shape(5), shape(5)), 10),
  "inside jit": (jax.jit(lambda a, b: jax.jit(jnp.matmul)(a, b)), (A, B), ONCE),
  "scan": (scanned, (SQUARE,), 6 * TURN),
  "scan in scan": (
    lambda x: jax.lax.scan(lambda c, _: (scanned(c, 3), None), x, length=5)[0],
    (SQUARE,),
    15 * TURN,
  ),
  "map": (lambda x: jax.lax.map(lambda y: y @ y, x), (shape(8, 4, 4),), 8 * TURN),
  "vmap": (jax.vmap(lambda y: y @ y), (shape(8, 4, 4),), 8 * TURN),
  "cond": (
    lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x),
    (SQUARE,),
    2 * TURN,
  ),
  "while": (
    lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, x),
    (SQUARE,),
    TURN,
  ),
  "custom_vjp": (custom, (SQUARE,), TURN),
  "custom_vjp backward": (jax.grad(lambda x: custom(x).sum()), (SQUARE,), 3 * TURN),
  "custom_jvp": (lambda x: jax.nn.relu(x @ x), (SQUARE,), TURN),
  "remat": (jax.checkpoint(lambda x: x @ x), (SQUARE,), TURN),
}


@pytest.mark.parametrize("name", HAND)
def test_against_counts_by_hand(name):
  function, args, want = HAND[name]
  assert count_flops(function, *args) == want


def test_a_dense_layer_forward_and_backward():
  layer = nn.Dense(7)
  x = shape(3, 5)
  params = jax.eval_shape(layer.init, jax.random.key(0), x)
  forward = 2 * 3 * 5 * 7

  def loss(params, x):
    return jnp.sum(layer.apply(params, x) ** 2)

  assert count_flops(loss, params, x) == forward
  assert count_flops(jax.value_and_grad(loss), params, x) == 2 * forward  # no gradient in x
  assert count_flops(jax.value_and_grad(loss, argnums=(0, 1)), params, x) == 3 * forward


def test_a_whole_training_step_with_accumulation():
  """Two layers, a scan over microbatches: forward and backward of every example."""

  def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params[0]) @ params[1])

  def step(params, batch):
    def body(total, x):
      return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

    grads = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), batch.reshape(4, 2, 5))[0]
    return jax.tree.map(lambda p, g: p - g, params, grads)

  params = (shape(5, 16), shape(16, 3))
  first, second = 2 * 8 * 5 * 16, 2 * 8 * 16 * 3
  # Nobody asks for the gradient in the batch: the first layer has two matmuls, the second three.
  assert count_flops(jax.jit(step), params, shape(8, 5)) == 2 * first + 3 * second


def test_rematerialisation_counts_again_what_is_done_again():
  def loss(x, wrap):
    return jnp.sum(wrap(lambda y: jnp.sin(jnp.sin(y @ y) @ y))(x))

  plain = count_flops(jax.grad(lambda x: loss(x, lambda f: f)), SQUARE)
  again = count_flops(jax.grad(lambda x: loss(x, jax.checkpoint)), SQUARE)
  assert plain == 6 * TURN and again == 8 * TURN


def conv(strides, groups=1, padding="VALID"):
  return lambda x, k: jax.lax.conv_general_dilated(
    x,
    k,
    strides,
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


@pytest.mark.parametrize(
  "x, kernel, strides, groups, forward",
  [
    ((2, 8, 8, 3), (4, 4, 3, 6), (4, 4), 1, 2 * 2 * 2 * 2 * 6 * 4 * 4 * 3),  # patches
    ((2, 8, 8, 4), (3, 3, 2, 6), (1, 1), 2, 2 * 2 * 6 * 6 * 6 * 3 * 3 * 2),  # two groups
    ((1, 9, 5, 4), (3, 1, 1, 4), (1, 1), 4, 2 * 1 * 7 * 5 * 4 * 3 * 1 * 1),  # depthwise
  ],
)
def test_convolutions(x, kernel, strides, groups, forward):
  function = conv(strides, groups)
  assert count_flops(function, shape(*x), shape(*kernel)) == forward
  weight = jax.grad(lambda k, x: function(x, k).sum())
  assert count_flops(weight, shape(*kernel), shape(*x)) == 2 * forward  # forward and kernel


def test_the_gradient_of_patches_costs_as_much_as_the_patches():
  function = conv((4, 4))
  both = jax.grad(lambda x, k: function(x, k).sum(), argnums=(0, 1))
  forward = count_flops(function, shape(2, 8, 8, 3), shape(4, 4, 3, 6))
  assert count_flops(both, shape(2, 8, 8, 3), shape(4, 4, 3, 6)) == 3 * forward


def test_a_sharded_function_counts_the_whole_batch():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  spec = PartitionSpec("data")
  function = jax.shard_map(
    lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
  )
  assert count_flops(function, shape(8, 5), B) == 2 * 8 * 5 * 7


def test_attention_fused_or_not_counts_the_same():
  q, k = shape(2, 6, 3, 4), shape(2, 10, 3, 4)
  plain = count_flops(lambda q, k: jax.nn.dot_product_attention(q, k, k), q, k)
  assert plain == 2 * (2 * 2 * 3 * 6 * 10 * 4)

  def fused(name):
    array = types.SimpleNamespace
    equation = array(
      primitive=array(name=name), params={"layout": 0}, invars=[array(aval=q), array(aval=k)]
    )
    from ssljax import flops

    return flops._equation(equation)

  assert fused("dot_product_attention_fwd_wrapper") == plain
  assert fused("dot_product_attention_bwd_wrapper") == 2 * plain


@pytest.mark.parametrize(
  "kind, dtype, tera",
  [
    ("TPU v4", "bfloat16", 275),
    ("TPU v5 lite", "bfloat16", 197),
    ("TPU v5p", "bfloat16", 459),
    ("TPU v5", "float32", 459),
    ("TPU v6 lite", "bfloat16", 918),
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
    ("NVIDIA A100-SXM4-80GB", "float32", 156),
    ("NVIDIA H100 80GB HBM3", "float16", 989.5),
    ("NVIDIA H100 PCIe", "bfloat16", 756.5),
    ("NVIDIA H200", "bfloat16", 989.5),
    ("NVIDIA H200 NVL", "float32", 417.5),
  ],
)
def test_peaks(kind, dtype, tera):
  assert device_peak_flops(kind, dtype) == tera * 1e12


def test_no_peak_is_invented():
  assert device_peak_flops("cpu") is None
  with pytest.raises(ValueError, match="no peak is known for int8"):
    device_peak_flops("TPU v4", "int8")
