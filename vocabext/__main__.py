"""`python -m vocabext`: the same as the `vocabext` command."""

from vocabext.cli.main import main

if __name__ == "__main__":
    main()
