"""One self-contained HTML page about runs: `gather.py` reads them, `figures.py` draws and `page.py` writes the HTML."""
