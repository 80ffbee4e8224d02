"""Writes one page that shows what a compression did: a single HTML file that needs no network and no script."""
