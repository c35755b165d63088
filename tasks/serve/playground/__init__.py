"""The playground: a page to search, generate, compare, edit and swap in a browser. Needs the extra ``web``."""
