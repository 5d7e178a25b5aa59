"""The terminal app lives here. It knows the engine; the engine does not know it."""
