#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

// One truth for options. Every group of options is a plain struct that owns each key's name,
// default, range and one-line doc, told to a visitor:
//
//   struct SgdOptions {
//     double momentum = 0.9;
//     template <class Visitor>
//     void visit(Visitor& v) {
//       v("momentum", momentum, at_least(0).below(1), "momentum of SGD");
//     }
//   };
//
//   describe<SgdOptions>()        the keys, for Python, the command line and the reference page
//   apply(values, options, where) sets keys by name; errors name key, value and what is allowed
//   values_of(options)            the resolved values
//
// Types of a value: bool, int64_t, double, std::string, std::vector<int64_t>, std::vector<double>.
namespace ntkcl {

using OptionValue =
    std::variant<bool, int64_t, double, std::string, std::vector<int64_t>, std::vector<double>>;
using OptionMap = std::map<std::string, OptionValue>;

// What is allowed: an interval for numbers (each element of a list), names for strings.
struct Allowed {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  bool low_open = false;
  bool high_open = false;
  std::vector<std::string> choices;

  Allowed at_most(double value) const;
  Allowed below(double value) const;
  std::string text() const;  // ">= 0 and < 1", "one of: a, b"; empty where all is allowed
};
Allowed anything();
Allowed at_least(double value);
Allowed above(double value);
Allowed one_of(std::vector<std::string> choices);

struct OptionInfo {
  std::string key;
  std::string type;  // "bool", "int", "float", "str", "list[int]", "list[float]"
  OptionValue default_value;
  Allowed allowed;
  std::string doc;
};

namespace detail {

void check_allowed(const std::string& where, const std::string& key, const OptionValue& value,
                   const Allowed& allowed);
[[noreturn]] void fail_type(const std::string& where, const std::string& key,
                            std::string_view expected, const OptionValue& got);
[[noreturn]] void fail_unknown(const std::string& where, const std::string& key,
                               const std::vector<std::string>& known);
std::string type_name(const OptionValue& value);

class Describer {
 public:
  template <class T>
  void operator()(std::string key, T& field, const Allowed& allowed, std::string doc) {
    OptionValue value(field);
    infos.push_back({std::move(key), type_name(value), value, allowed, std::move(doc)});
  }
  std::vector<OptionInfo> infos;
};

class Setter {
 public:
  Setter(const OptionMap& values, std::string where) : values_(values), where_(std::move(where)) {}

  template <class T>
  void operator()(const std::string& key, T& field, const Allowed& allowed, std::string_view) {
    known.push_back(key);
    const auto found = values_.find(key);
    if (found == values_.end()) {
      return;
    }
    OptionValue value = found->second;
    if constexpr (std::is_same_v<T, double>) {
      if (const auto* whole = std::get_if<int64_t>(&value)) {
        value = static_cast<double>(*whole);
      }
    } else if constexpr (std::is_same_v<T, std::vector<double>>) {
      if (const auto* whole = std::get_if<std::vector<int64_t>>(&value)) {
        value = std::vector<double>(whole->begin(), whole->end());
      }
    }
    if (!std::holds_alternative<T>(value)) {
      fail_type(where_, key, type_name(OptionValue(field)), value);
    }
    check_allowed(where_, key, value, allowed);
    field = std::get<T>(value);
  }
  std::vector<std::string> known;

 private:
  const OptionMap& values_;
  std::string where_;
};

class Reader {
 public:
  template <class T>
  void operator()(const std::string& key, T& field, const Allowed&, std::string_view) {
    values[key] = OptionValue(field);
  }
  OptionMap values;
};

}  // namespace detail

template <class Options>
std::vector<OptionInfo> describe() {
  Options options;
  detail::Describer describer;
  options.visit(describer);
  return describer.infos;
}

template <class Options>
void apply(const OptionMap& values, Options& options, const std::string& where) {
  detail::Setter setter(values, where);
  options.visit(setter);
  for (const auto& [key, value] : values) {
    bool found = false;
    for (const std::string& known : setter.known) {
      found = found || known == key;
    }
    if (!found) {
      detail::fail_unknown(where, key, setter.known);
    }
  }
}

template <class Options>
OptionMap values_of(Options options) {
  detail::Reader reader;
  options.visit(reader);
  return reader.values;
}

}  // namespace ntkcl
