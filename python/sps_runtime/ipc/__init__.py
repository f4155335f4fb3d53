"""How processes talk, start and end. Standard library, msgspec and pyzmq only."""
