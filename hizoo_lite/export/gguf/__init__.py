"""Exports for llama.cpp and Ollama: a LoRA adapter, or a merged model, as one GGUF file."""
