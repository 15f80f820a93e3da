"""What is searched: space, objectives, the allocation path with its expansions, the proxy, hardware tables, and their preparation."""
