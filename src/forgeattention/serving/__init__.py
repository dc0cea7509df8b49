"""Serving over HTTP: an OpenAI-compatible endpoint whose requests share one packed page pool."""
