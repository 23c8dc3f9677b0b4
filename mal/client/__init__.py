"""The remote client: submit tasks to a Ray cluster's job server and look after them. Imports ray only in functions."""
