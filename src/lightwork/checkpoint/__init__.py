"""State on disk: safetensors and a JSON manifest, never pickle."""
