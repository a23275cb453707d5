#include "ntkcl/core/options.h"

#include <algorithm>
#include <numeric>

#include "ntkcl/core/error.h"

namespace ntkcl {
namespace {

std::string number_text(double value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

template <class T>
std::string element_text(const T& value) {
  if constexpr (std::is_same_v<T, bool>) {
    return value ? "true" : "false";
  } else if constexpr (std::is_same_v<T, std::string>) {
    return "'" + value + "'";
  } else {
    return number_text(static_cast<double>(value));
  }
}

template <class T>
std::string element_text(const std::vector<T>& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i ? ", " : "") + element_text(values[i]);
  }
  return text + "]";
}

std::string value_text(const OptionValue& value) {
  return std::visit([](const auto& held) { return element_text(held); }, value);
}

// Levenshtein distance.
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row[b.size()];
}

template <class T>
bool inside(const T& value, const Allowed& allowed) {
  if constexpr (std::is_same_v<T, bool>) {
    return true;
  } else if constexpr (std::is_same_v<T, std::string>) {
    const auto& names = allowed.choices;
    return names.empty() || std::find(names.begin(), names.end(), value) != names.end();
  } else {
    const auto number = static_cast<double>(value);
    const bool above_low = allowed.low_open ? number > allowed.low : number >= allowed.low;
    const bool below_high = allowed.high_open ? number < allowed.high : number <= allowed.high;
    return above_low && below_high;
  }
}

template <class T>
bool inside(const std::vector<T>& values, const Allowed& allowed) {
  return std::all_of(values.begin(), values.end(), [&](T v) { return inside(v, allowed); });
}

}  // namespace

Allowed Allowed::at_most(double value) const {
  Allowed copy = *this;
  copy.high = value;
  copy.high_open = false;
  return copy;
}

Allowed Allowed::below(double value) const {
  Allowed copy = at_most(value);
  copy.high_open = true;
  return copy;
}

std::string Allowed::text() const {
  if (!choices.empty()) {
    std::string text = "one of: ";
    for (size_t i = 0; i < choices.size(); ++i) {
      text += (i ? ", " : "") + choices[i];
    }
    return text;
  }
  std::string text;
  if (low != -std::numeric_limits<double>::infinity()) {
    text = (low_open ? "> " : ">= ") + number_text(low);
  }
  if (high != std::numeric_limits<double>::infinity()) {
    text += (text.empty() ? "" : " and ");
    text += (high_open ? "< " : "<= ") + number_text(high);
  }
  return text;
}

Allowed anything() {
  return {};
}

Allowed at_least(double value) {
  Allowed allowed;
  allowed.low = value;
  return allowed;
}

Allowed above(double value) {
  Allowed allowed = at_least(value);
  allowed.low_open = true;
  return allowed;
}

Allowed one_of(std::vector<std::string> choices) {
  Allowed allowed;
  allowed.choices = std::move(choices);
  return allowed;
}

namespace detail {

std::string type_name(const OptionValue& value) {
  static const char* const kNames[] = {"bool", "int", "float", "str", "list[int]", "list[float]"};
  return kNames[value.index()];
}

void check_allowed(const std::string& where, const std::string& key, const OptionValue& value,
                   const Allowed& allowed) {
  const bool ok = std::visit([&](const auto& held) { return inside(held, allowed); }, value);
  NTKCL_CHECK(ok, where, "'", key, "': expected ", allowed.text(), ", got ", value_text(value));
}

void fail_type(const std::string& where, const std::string& key, std::string_view expected,
               const OptionValue& got) {
  NTKCL_FAIL(TypeError, where, "'", key, "': expected ", expected, ", got ", type_name(got), " ",
             value_text(got));
}

void fail_unknown(const std::string& where, const std::string& key,
                  const std::vector<std::string>& known) {
  const auto nearest = std::min_element(
      known.begin(), known.end(),
      [&](const auto& a, const auto& b) { return edit_distance(a, key) < edit_distance(b, key); });
  std::string hint;
  if (nearest != known.end() &&
      edit_distance(*nearest, key) <= std::max<size_t>(2, key.size() / 3)) {
    hint = "; did you mean '" + *nearest + "'?";
  }
  NTKCL_FAIL(ValueError, where, "unknown key '", key, "'", hint);
}

}  // namespace detail
}  // namespace ntkcl
