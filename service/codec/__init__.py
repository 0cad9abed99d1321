"""The codec as pure torch: transforms, exact prior, entropy coding and the bitstream container.

Nothing here knows HTTP, settings or files; `service.engine` drives it and `model_store.training` trains it.
"""
