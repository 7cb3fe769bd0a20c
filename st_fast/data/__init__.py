"""From images to batches: sources → `prepare` (VAE encode) → shards → loaders. No loader has state."""
