"""The service: settings, app factory, routes, schemas, errors, metrics."""
