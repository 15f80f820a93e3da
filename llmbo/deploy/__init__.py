"""A trial of a stored run -> a folder or file that loads where people deploy."""
