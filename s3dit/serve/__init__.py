"""`s3dit serve`: pictures over HTTP, by the contract of OpenAI's images API."""
