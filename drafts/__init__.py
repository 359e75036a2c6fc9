"""The ensemble: divergences, manifest, vLLM model, engine and its plain-transformers reference."""
