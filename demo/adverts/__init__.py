"""A small LLaVA that judges drawn adverts, and all that makes and checks it."""
