"""The loss in JAX, with its gradients: `python examples/jax_loss.py`. Needs JAX.

`loss` reads JAX's memory where it is, on the CPU or a GPU. Under `jax.jit`, arrays have no memory until the program
runs, so `loss_in_jit` passes them to a callback on the host.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cpr_fast.ops import dlpack

OF = ("query", "own_key")  # the memory is constant


@jax.custom_vjp
def loss(query, own_key, memory, positives):
    """Returns the MIL-NCE loss [] of query, own_key [B, D], memory [K, D] and positives [B, P]."""
    return dlpack.mil_nce(query, own_key, memory, positives, temperature=0.1)


def _forward(*arguments):
    return dlpack.mil_nce_value_and_grad(*arguments, of=OF, temperature=0.1)


def _backward(gradients, cotangent):
    return *(cotangent * gradient for gradient in gradients), None, None


loss.defvjp(_forward, _backward)


@jax.custom_vjp
def loss_in_jit(query, own_key, memory, positives):
    """Returns the same loss; may be called under `jax.jit`."""
    return _callback(query, own_key, memory, positives)[0]


def _callback(query, own_key, memory, positives):
    def on_host(*arguments):
        value, gradients = _forward(*map(np.asarray, arguments))
        return value, *gradients

    shapes = [jax.ShapeDtypeStruct(shape, query.dtype) for shape in ((), query.shape, own_key.shape)]
    value, *gradients = jax.pure_callback(on_host, tuple(shapes), query, own_key, memory, positives)
    return value, tuple(gradients)


loss_in_jit.defvjp(_callback, _backward)


def reference(query, own_key, memory, positives):
    """Returns the same loss in plain JAX, for distinct positives."""
    own = (query * own_key).sum(1, keepdims=True) / 0.1
    scores = query @ memory.T / 0.1
    chosen = jnp.take_along_axis(scores, positives, axis=1)
    logsumexp = jax.nn.logsumexp
    every, positive = jnp.concatenate([own, scores], 1), jnp.concatenate([own, chosen], 1)
    return (logsumexp(every, axis=1) - logsumexp(positive, axis=1)).mean()


def main() -> None:
    """Compares both functions, and their gradients, with plain JAX."""
    rng = np.random.default_rng(0)
    query, own_key, memory = (rng.standard_normal((n, 32), np.float32) for n in (8, 8, 512))
    arrays = [jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (query, own_key, memory)]
    arrays.append(dlpack.cascade_select(arrays[0][None], arrays[2][None], views=[0], keep=[5])[0])
    expected = jax.value_and_grad(reference, argnums=(0, 1))(*arrays)
    for function in (loss, loss_in_jit, jax.jit(loss_in_jit)):
        found = jax.value_and_grad(function, argnums=(0, 1))(*arrays)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    print(f"loss {found[0]:.6f}, plain JAX {expected[0]:.6f}")


if __name__ == "__main__":
    main()
