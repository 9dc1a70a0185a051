"""Execution: sessions, the engine loop, scheduling, pages of keys and values, sampling and weight loading."""
