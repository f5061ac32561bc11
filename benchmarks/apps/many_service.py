"""The service with a hundred more routes."""

from app.main import create_app
from app.settings import load_settings
from many_routes import add_routes

app = create_app(load_settings())
add_routes(app)
