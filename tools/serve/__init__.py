"""`recipe serve`: a trained model behind the requests of OpenAI's API."""
