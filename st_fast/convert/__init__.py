"""Models as other libraries load them: a Hugging Face folder, a diffusers pipeline, a model card, the hub.

`sit_transformer.py` and `pipeline.py` are copied into diffusers folders and run there without st_fast.
"""
