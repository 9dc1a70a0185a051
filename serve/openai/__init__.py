"""The routes of the OpenAI API: schemas beside the code that answers them."""
