"""`python -m relay`: the command `relay` where its script is not installed, such as in a checkout."""

from relay.cli.main import main

main()
