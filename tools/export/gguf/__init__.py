"""A run's export as one GGUF file, for llama.cpp, Ollama and LM Studio, and the proof that these read it as we do."""
