"""`bn-bench run`, `compare` and `report`: layers checked, timed, recorded and compared."""
