"""A small LLaVA that judges drawn adverts, and everything that makes and checks it."""
