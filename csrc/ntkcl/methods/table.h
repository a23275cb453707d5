#pragma once

#include <memory>

#include "ntkcl/core/options.h"
#include "ntkcl/methods/method.h"
#include "ntkcl/nn/vision_transformer.h"

namespace ntkcl::methods {

// One method as the loop and the configuration know it.
struct MethodEntry {
  std::string name;     // "ntk-cl"
  std::string section;  // key prefix of its options: "ntk_cl"
  std::string doc;
  std::vector<OptionInfo> options;
  OptionMap defaults;  // of keys of the task loop, where this method has others
  // What each variant presets; values given explicitly win.
  std::map<std::string, OptionMap> variants;
  // ValueError/TypeError for option values that do not fit.
  std::unique_ptr<Method> (*make)(const OptionMap& options, const nn::VisionTransformer& vit,
                                  int64_t tasks, RandomSource& random);
};

// Makes a method, whatever it needs to know beside these.
using MakeMethod = std::function<std::unique_ptr<Method>(const nn::VisionTransformer& vit,
                                                         int64_t tasks, RandomSource& random)>;
// Of the table. ValueError lists the known names.
MakeMethod make_method(const std::string& name, OptionMap options);

// All methods. A new one is a folder and a line here.
const std::vector<MethodEntry>& method_table();
// ValueError lists the known names.
const MethodEntry& find_method(const std::string& name);

}  // namespace ntkcl::methods
