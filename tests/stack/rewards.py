"""A reward that any model earns sometimes."""


def parity(prompt: str, response: str, answer: str) -> float:
    """1 if the response has an even number of decision words."""
    return float(sum(word.startswith("A") for word in response.split()) % 2 == 0)
