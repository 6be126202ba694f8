"""Four tests, one a file, their null made from the tensor itself, and what their evidence adds up to."""
