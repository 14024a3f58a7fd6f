"""The output rows: fitted so that the model writes new tokens."""
