"""The Llama that trains: megatron-core's GPTModel through specs, with this project's ops in it."""
