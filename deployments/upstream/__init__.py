"""Chat models that another server loads, places and runs."""
