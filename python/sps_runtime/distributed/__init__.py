"""The mesh of ranks and how bytes cross it."""
