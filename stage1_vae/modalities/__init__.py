"""VAEs of things that are seen in several ways: a posterior of each way, put together."""
