"""One self-contained page about runs of a search: `gather.py` reads them, `figures.py` draws, `page.py` writes HTML."""
