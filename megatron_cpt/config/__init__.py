"""The configuration: one strict schema, one loader, one manifest for every artefact."""
