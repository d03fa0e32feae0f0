"""The machine: devices, the engine's import hook, the mesh of ranks and the launcher."""
