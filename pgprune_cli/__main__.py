"""python -m pgprune_cli"""

from pgprune_cli.cli.program import main

main()
