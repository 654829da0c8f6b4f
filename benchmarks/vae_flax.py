"""The peer of `vae_published`: its setup `flax` trained by Flax itself, on the same black and white digits.

    python -m benchmarks.vae_published --data mnist.npz --export binary.npz
    python benchmarks/vae_flax.py binary.npz [--seed 0] [--epochs 30]      with jax, flax and optax, and without Zellige

784-500-(20, 20) and 20-500-784, ReLU, Adam 1e-3, batches of 128, one draw of the latents, Flax's own initial weights.
Prints -ELBO of the held-out and the test digits, of one draw each, after every fifth epoch.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

LATENTS, HIDDEN, BATCH = 20, 500, 128


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x, key):
        hidden = nn.relu(nn.Dense(HIDDEN)(x))
        mean, log_variance = nn.Dense(LATENTS)(hidden), nn.Dense(LATENTS)(hidden)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        logits = nn.Dense(x.shape[-1])(nn.relu(nn.Dense(HIDDEN)(z)))
        likelihood = -optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum(-1)
        return kl - likelihood


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    given = parser.parse_args()
    parts = {name: pixels.reshape(len(pixels), -1) for name, pixels in np.load(given.digits).items()}
    model, optimizer = VAE(), optax.adam(1e-3)
    key = jax.random.key(given.seed)
    weights = model.init(key, jnp.zeros((1, 784)), key)
    state = optimizer.init(weights)

    @jax.jit
    def step(weights, state, x, key):
        gradient = jax.grad(lambda given: model.apply(given, x, key).mean())(weights)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(weights, updates), state

    bound = jax.jit(model.apply)
    chance, begin, done = np.random.default_rng(given.seed), time.time(), 0
    for epoch in range(1, given.epochs + 1):
        order = chance.permutation(len(parts["train"]))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = jnp.asarray(parts["train"][order[start : start + BATCH]], jnp.float32)
            weights, state = step(weights, state, batch, jax.random.fold_in(key, done))
            done += 1
        if epoch % 5 == 0 or epoch == given.epochs:
            found = {
                name: float(
                    bound(weights, jnp.asarray(parts[name], jnp.float32), jax.random.fold_in(key, 2**31)).mean()
                )
                for name in ("validation", "test")
            }
            print(f"epoch {epoch}: -ELBO {found}, {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
