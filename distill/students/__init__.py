"""Students: loading, removing layers, adapters, saving. Nothing here depends on teachers."""
