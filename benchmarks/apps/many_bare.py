"""Bare FastAPI with a hundred routes."""

from fastapi import FastAPI
from many_routes import add_routes

app = FastAPI()
add_routes(app)
