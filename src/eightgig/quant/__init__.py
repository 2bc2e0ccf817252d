"""NF4 and the store of prepared weights."""
