"""vLLM's general-plugin entry point: makes the ensemble model known in each of vLLM's processes."""


def register() -> None:
    """Register the architecture by name; the model itself is imported only where it runs."""
    from vllm import ModelRegistry

    if "EnsembleForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("EnsembleForCausalLM", "drafts.vllm_model:EnsembleForCausalLM")
